"""I am here, as long as I can answer: registered, kept registered, withdrawn, drained."""
