"""What to train and what it will cost, before anything runs. Imports report, cost, train, model,
data and what lies below; nothing of stages."""
