"""What tests share: small models, checkpoints in every layout, processes. Holds no test."""
