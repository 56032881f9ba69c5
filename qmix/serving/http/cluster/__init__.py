"""The server on a Ray cluster: replicas behind Ray Serve's proxies.

Ray Serve starts, watches and replaces replicas, and gives each a share of the requests.
"""
