"""What to train and what it will cost, before anything runs. Imports cost, model and train;
nothing of stages."""
