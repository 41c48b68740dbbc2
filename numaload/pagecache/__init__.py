"""The page cache: bringing models into it, what of them is there, giving it back."""
