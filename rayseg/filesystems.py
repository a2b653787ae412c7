"""File systems whose errors name the object, the permission and the remedy; `rayseg.store` registers them."""

from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

PERMISSIONS = {
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "delete_object": "s3:DeleteObject",
    "delete_objects": "s3:DeleteObject",
    "head_bucket": "s3:ListBucket",
    "list_objects_v2": "s3:ListBucket",
}
"""Request of the S3 client -> the permission that it needs."""


class NamingS3(S3FileSystem):  # type: ignore[misc]
    """s3fs, whose "Access Denied" says for which object."""

    async def _call_s3(self, method: str, *given: dict[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401 - s3fs's signature
        try:
            return await super()._call_s3(method, *given, **kwargs)
        except PermissionError as error:
            values = {name: value for part in (*given, kwargs) for name, value in part.items()}
            place = f"s3://{values.get('Bucket', '')}/{values.get('Key', values.get('Prefix', ''))}"
            raise PermissionError(
                f"{place}: {error}; the keys in use need {PERMISSIONS.get(method, method)} there: grant it, or name "
                "other keys by AWS_PROFILE, or by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error.__cause__

    call_s3 = sync_wrapper(_call_s3)  # the parent's calls the parent's method


class NoGoogle(AbstractFileSystem):  # type: ignore[misc]
    """Stands for gs:// where gcsfs is not installed."""

    protocol = ("gs", "gcs")

    def __init__(self, *_: object, **__: object) -> None:
        raise OSError(
            "gs:// needs the package gcsfs: pip install gcsfs; or use Google's S3 interface: s3://bucket with "
            "AWS_ENDPOINT_URL=https://storage.googleapis.com and an HMAC key in AWS_ACCESS_KEY_ID"
        )
