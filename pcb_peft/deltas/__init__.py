"""The change that an adapter makes to one weight: low-rank, dense, diagonal or rescaled; its rank and its layout."""
