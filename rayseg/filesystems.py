"""File systems whose errors name the object, the permission and the remedy; `rayseg.store` registers them."""

from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from rayseg.errors import ConfigError, StoreRefused

PERMISSIONS = {
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject and s3:ListBucket",  # without the second a missing object counts as forbidden
    "delete_object": "s3:DeleteObject",
    "delete_objects": "s3:DeleteObject",
    "head_bucket": "s3:ListBucket",
    "list_objects_v2": "s3:ListBucket",
}
"""Request of the S3 client -> the permission that it needs."""


REFUSALS = {
    "ExpiredToken": "the session token has expired",
    "TokenRefreshRequired": "the session token has expired",
    "InvalidToken": "the session token is not valid",
    "InvalidAccessKeyId": "the store does not know the access key",
    "SignatureDoesNotMatch": "the secret key does not fit the access key",
    "RequestTimeTooSkewed": "the clock of this machine differs from the store's by more than 15 minutes; correct it",
}
"""Error code of a store that refuses every request with these keys -> its cause."""


class NamingS3(S3FileSystem):  # type: ignore[misc]
    """s3fs, whose errors name the bucket or object, the missing permission and the remedy."""

    async def _call_s3(self, method: str, *given: dict[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401 - s3fs's signature
        try:
            return await super()._call_s3(method, *given, **kwargs)
        except OSError as error:
            values = {name: value for part in (*given, kwargs) for name, value in part.items()}
            bucket, key = values.get("Bucket", ""), values.get("Key", values.get("Prefix", ""))
            place = f"s3://{bucket}/{key}"
            code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", "")
            if method == "head_object" and code in {"400", "403"}:
                # An answer to HEAD has no body and so no reason; one to GET has.
                await self._call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
            if code in {"NoSuchBucket", "InvalidBucketName"} and method != "create_bucket":
                # Not a missing file, for which many functions have an answer of their own.
                raise ConfigError(
                    f"{place} cannot be used: {self.endpoint_url or 'S3'} "
                    f"has no bucket {bucket!r}; correct its name, create it, or name another store or account by "
                    "AWS_ENDPOINT_URL and AWS_PROFILE"
                ) from error.__cause__
            if code in REFUSALS:
                raise StoreRefused(
                    f"{place} cannot be used: {REFUSALS[code]} ({code}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID, "
                    "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, then run the same command to resume"
                ) from error.__cause__
            if not isinstance(error, PermissionError):
                raise
            raise PermissionError(
                f"{place}: {error}; the keys in use need {PERMISSIONS.get(method, method)} there: grant it, or name "
                "other keys by AWS_PROFILE, or by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error.__cause__

    call_s3 = sync_wrapper(_call_s3)  # the parent's calls the parent's method


class NoGoogle(AbstractFileSystem):  # type: ignore[misc]
    """Stands for gs:// where gcsfs is not installed."""

    protocol = ("gs", "gcs")

    def __init__(self, *_: object, **__: object) -> None:
        raise ConfigError(
            "gs:// needs the package gcsfs: pip install gcsfs; or use Google's S3 interface: s3://bucket with "
            "AWS_ENDPOINT_URL=https://storage.googleapis.com and an HMAC key in AWS_ACCESS_KEY_ID"
        )
