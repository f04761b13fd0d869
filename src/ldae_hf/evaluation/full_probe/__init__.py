"""The paper's linear probe (section 5): a classifier on the frozen features of augmented images, in batches of 16,384.
What is trained (head, lars), what the protocol is (protocol), and the training (run).
"""

from .run import run_full_probe


__all__ = ["run_full_probe"]
