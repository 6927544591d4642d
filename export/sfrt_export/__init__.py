"""The offline half: published checkpoints in, bundles out. Nothing here is needed to stream."""
