"""Predict with several methods how much the loss rises if a group gets a smaller format."""
