"""Losses over packed batches."""

from edgejax.losses.next_token import next_token_loss as next_token_loss
