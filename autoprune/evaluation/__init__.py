"""How good a network is before fine-tuning: importance of channels, accuracy, and the
proxy that scores sub-models.
"""
