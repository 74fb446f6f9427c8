"""Models as files for other runtimes, and as folders for the Hugging Face Hub."""
