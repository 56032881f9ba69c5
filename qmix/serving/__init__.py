"""Serving: many callers, one model. Requests share decode steps, in slots that keep their caches.

Knows neither HTTP nor terminals. `Engine` runs a `Scheduler` in a thread of its own.
"""
