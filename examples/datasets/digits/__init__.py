"""The UCI handwritten digits, 8 by 8 pixels, as scikit-learn ships them."""
