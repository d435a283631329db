"""Speed and memory against stock Keras: one harness, one file a theme, results as JSON and the tables made from it."""
