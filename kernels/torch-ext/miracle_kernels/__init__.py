"""The GPU half of the project: a Hugging Face kernel repository. It has no kernel yet."""
