"""Tasks: labelled images, class names and prompts."""
