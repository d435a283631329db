"""Tools that show what half precision does to a model. They read and never change a number."""
