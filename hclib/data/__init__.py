"""Which images, which masks, which labels: every data set as one index frame."""
