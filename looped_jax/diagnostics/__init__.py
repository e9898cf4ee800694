"""Diagnosis of a trained run: token measurements, weight statistics, and figures."""
