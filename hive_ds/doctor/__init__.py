"""Is all that training needs in place? Every finding that is not fine says what to do."""
