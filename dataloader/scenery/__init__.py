"""The parts that dataloader/synthetic.py draws scenes with."""
