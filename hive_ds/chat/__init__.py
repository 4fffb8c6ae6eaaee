"""Asking a trained model about pictures: in the terminal, and on a page in the browser."""
