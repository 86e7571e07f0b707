#include "identity.h"

#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>

bool identity_common_name(X509 *certificate, char name[MAX_NAME_BYTES])
{
	X509_NAME *subject = X509_get_subject_name(certificate);
	int index = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
	unsigned char *text = NULL;
	bool found = false;
	int length;

	if(index < 0 || X509_NAME_get_index_by_NID(subject, NID_commonName, index) != -1){
		return false;
	}
	length = ASN1_STRING_to_UTF8(&text, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, index)));
	if(length > 0 && length < MAX_NAME_BYTES && !memchr(text, '\0', (size_t)length)){
		memcpy(name, text, (size_t)length);
		name[length] = '\0';
		found = true;
	}
	OPENSSL_free(text);
	return found;
}

bool identity_key_digest(X509 *certificate, unsigned char digest[DIGEST_BYTES])
{
	unsigned char *der = NULL;
	unsigned int size = 0;
	int length = i2d_X509_PUBKEY(X509_get_X509_PUBKEY(certificate), &der);
	bool done = length > 0 && EVP_Digest(der, (size_t)length, digest, &size, EVP_sha256(), NULL) == 1 && size == DIGEST_BYTES;

	OPENSSL_free(der);
	return done;
}

static int hexadecimal(char digit)
{
	return digit >= '0' && digit <= '9' ? digit - '0' : digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

bool identity_parse_digest(const char *text, unsigned char digest[DIGEST_BYTES])
{
	if(strlen(text) != 2 * DIGEST_BYTES){
		return false;
	}
	for(size_t i = 0; i < DIGEST_BYTES; i++){
		int high = hexadecimal(text[2 * i]), low = hexadecimal(text[2 * i + 1]);

		if(high < 0 || low < 0){
			return false;
		}
		digest[i] = (unsigned char)(high << 4 | low);
	}
	return true;
}

void *identity_new_digest(const char *text)
{
	unsigned char *digest = malloc(DIGEST_BYTES);

	if(digest && !identity_parse_digest(text, digest)){
		free(digest);
		return NULL;
	}
	return digest;
}
