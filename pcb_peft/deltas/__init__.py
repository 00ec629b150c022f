"""What an adapter does to one weight: low-rank, dense, diagonal or rescaled; its rank and its layout."""
