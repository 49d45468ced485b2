"""Lesions of a pair from two diameters each: pseudo-masks, a siamese network, a mask for each phase."""
