"""What a person sees of the main job: the terminal, the pictures and the page."""
