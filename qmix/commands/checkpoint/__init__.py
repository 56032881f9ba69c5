"""Commands on a checkpoint's files: inspect, verify, export, convert."""
