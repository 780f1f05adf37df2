"""Speed measured by the product's own code: `dist-spin bench optimize|quantize|inference`."""
