"""The second moment: runs once for each attempt, on clusters whose target needs another body than decide left."""
