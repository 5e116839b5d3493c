"""Whether early exits will pay on a model, before anything is trained. Knows no policy and no trainer."""
