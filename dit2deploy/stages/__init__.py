"""Stages are verbs: each reads artefacts and writes one. No stage imports another; they meet at artefacts."""
