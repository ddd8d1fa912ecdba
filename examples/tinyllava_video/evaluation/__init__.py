"""Multiple-choice benchmarks of video understanding, asked as the authors of the model ask them."""
