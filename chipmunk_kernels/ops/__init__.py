"""The public operations: argument checks, dispatch and `torch.library` registration, one file per family."""
