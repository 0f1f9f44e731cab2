"""Where prompts come from: files, the Hugging Face hub, the Countdown generator."""
