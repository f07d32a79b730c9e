"""The distribution, the image, the workflows and the Compose file."""
