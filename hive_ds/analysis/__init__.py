"""What a trained model does, seen from outside: where its text looks."""
