"""Text in, batches of token blocks out: streaming, cached once, exact in order and on resume."""
