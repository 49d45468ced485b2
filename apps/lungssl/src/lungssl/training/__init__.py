"""The training engine: one loop for pretraining and fine-tuning."""
