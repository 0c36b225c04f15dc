"""Pure wire formats: values in, bytes out, and back."""
