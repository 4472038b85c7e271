"""What is right: every operation in dense, slow, obvious PyTorch.

Plain tensors in and out, nothing but torch imported, every input left untouched. A function computes in the
dtype that it is given: pass float64 for the truth, or a kernel's own dtype for an independent computation to
compare with.
"""
