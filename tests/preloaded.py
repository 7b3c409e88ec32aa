"""What the server behind `start_ranks` has done before it forks a rank: the imports, and the tokenizer's training."""
import data
import ppo  # noqa: F401

data.embedded_tokenizer()
