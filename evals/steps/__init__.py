"""The steps of the GPU acceptance command (qmix.evals.gpu): one file each, and what they share."""
