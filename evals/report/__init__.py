"""Reports as pages of HTML: what measured figures look like. Measures nothing itself."""
