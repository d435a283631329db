"""Dense layers, embeddings, dropout, and other layers of single timesteps or features."""
