"""Pages: HTML that stands alone, and the pictures in it. Knows no model and computes nothing."""
