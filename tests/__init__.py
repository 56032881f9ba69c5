"""Tests, a folder for each room of qmix; what they share is in support/."""
