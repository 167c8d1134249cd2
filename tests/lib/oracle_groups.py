"""The oracles of the ops over responses to the same prompt."""

from tests.lib.oracle import group_advantages as group_advantages
from tests.lib.oracle import p3o_loss as p3o_loss
