"""What is built and run elsewhere: the distribution, the image, workflows, Compose."""
