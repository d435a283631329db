"""Speed and memory against stock Keras. One harness times one file for each theme, and writes JSON and tables."""
