"""What of docs/ is made from the code: the reference and the pictures. ``make docs`` writes it again."""
