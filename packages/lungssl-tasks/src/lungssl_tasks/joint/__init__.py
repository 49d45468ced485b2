"""Registration and segmentation of a pair by one model: what two tasks share, and how their losses are weighed."""
